"""Passes that write routers, in the masked form, and that show what routers decide."""
