"""One page from many records: what was measured, which differences are sure, and how each number was made."""
