"""The published model families: their config fields and tensor names, and ours. All foreign names stand here."""
