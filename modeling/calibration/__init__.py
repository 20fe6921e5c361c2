"""Routers fitted to a frozen model on real text."""
