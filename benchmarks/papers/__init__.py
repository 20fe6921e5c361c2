"""The experiments of the DLO and TLI papers (arXiv 2407.11030, 2410.11654) on a model and text that are at hand."""
