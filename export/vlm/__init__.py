"""What vision-language families share: the steps from a checkpoint to a bundle, parity and golden samples."""
