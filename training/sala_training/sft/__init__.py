"""Supervised fine-tuning: chats as files hold them become packed rows with a loss on what the model says."""
