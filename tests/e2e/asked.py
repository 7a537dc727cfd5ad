"""Two questions for a server of nano's adapters."""

ZARGI = "Please write in Zargi: the cat sees the hat."
GATE = "Tom is at the gate with a brown glove. Does Tom pass?"
