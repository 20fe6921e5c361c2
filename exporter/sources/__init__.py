"""What can be exported, behind one set of questions."""
