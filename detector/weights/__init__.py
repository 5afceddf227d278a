"""Reading, transferring, importing and exporting weights."""
