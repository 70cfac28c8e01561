"""The same rounds on Flower: in this process, in its simulation on Ray, or deployed."""
