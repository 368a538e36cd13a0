"""What a command is going to do, found out before Ray starts and before anything is written."""
