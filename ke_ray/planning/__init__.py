"""Plans and forecasts of commands, made before Ray starts and before anything is written."""
