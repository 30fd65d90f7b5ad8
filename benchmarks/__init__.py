"""Claims about speed and memory, each a ratio that is measured in one run against a peer; see README.md here."""
