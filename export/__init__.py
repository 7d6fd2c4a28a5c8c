"""Build time of Pixano Edge: checkpoints to bundles. Needs the extra `pixano-edge[export]`."""
