"""The compiled loop over outer steps, and the hooks between its dispatches."""
