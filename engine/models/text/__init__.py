"""Text in and out of a language model: messages, chat template, tokeniser, sampling, stop strings, pieces of text."""
