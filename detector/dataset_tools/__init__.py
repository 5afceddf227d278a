"""Getting, converting and splitting datasets; nothing here is needed to train."""
