"""What reaches the loss, checked: rules, findings, and the pages that show them."""
