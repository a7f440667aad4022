"""One file per operation: its plain-torch reference and the public function that picks the fastest path."""
