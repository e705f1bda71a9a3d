"""What the programs are made of, a room for each thing they do; tests/test_rooms.py says which may import which."""
