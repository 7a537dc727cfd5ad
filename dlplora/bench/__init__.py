"""Time or count one system: shapes, systems, sessions, hardware, operator counts."""
