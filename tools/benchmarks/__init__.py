"""Speed and memory compared with a peer in one process."""
