"""`fastexperts run -- COMMAND`: another's trainer, with fastexperts switched on in the models it loads."""
