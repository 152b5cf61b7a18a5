"""Where states come from: recordings, demonstrations, and the calibration set made of them."""
