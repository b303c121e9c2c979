"""The pure step: state, losses, optimizer, schedule."""
