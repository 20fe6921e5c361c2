"""Files and folders: mapping, JSON, hashes, room on the disk, folders that appear whole or not at all."""
