"""Speed and memory beside a peer, in one process."""
