"""`fastexperts run -- COMMAND`: somebody else's trainer, with fastexperts switched on in the models it loads."""
