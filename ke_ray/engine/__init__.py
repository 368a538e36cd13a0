"""Everything that runs on Ray. No other package of ke_ray imports it (a test proves it)."""
