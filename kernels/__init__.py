"""One file per operation: its plain-torch reference and the public function that chooses the fastest path."""
