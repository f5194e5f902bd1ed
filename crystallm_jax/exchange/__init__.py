"""Models in and out: from any format, a run among them, to any other, and what can be said of one."""
