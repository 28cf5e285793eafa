"""Gate sites: finding them in any network, measuring them, and what the measurements say."""
