"""Messages: what ranks tell each other, as typed data. Checked, never unpickled."""
