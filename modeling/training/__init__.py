"""Supervised fine-tuning with the routers in place: what DLO (arXiv 2407.11030) is."""
