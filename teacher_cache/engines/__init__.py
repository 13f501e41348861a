"""What runs the teacher."""
