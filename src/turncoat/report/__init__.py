"""The page an audit leaves: read from its folder alone, so it can be rebuilt at any time."""
