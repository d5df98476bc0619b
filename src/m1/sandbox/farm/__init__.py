"""Many sandboxes at once: bounded, leased, measured, cleaned up after."""
