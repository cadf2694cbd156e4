"""Libraries for Apple's platforms, written and checked without Apple's tools."""
