"""Data: random-access sources, and the one pipeline that feeds training from them."""
