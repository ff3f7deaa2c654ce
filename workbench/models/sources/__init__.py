"""One file per kind of source; each says whether a request fits it (`fits`) and reads it (`read`)."""
