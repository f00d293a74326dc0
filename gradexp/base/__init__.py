"""What every room stands on: errors that users see, and files that are there whole or not at all."""
