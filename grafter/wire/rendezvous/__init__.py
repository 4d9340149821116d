"""Rendezvous: how the ranks of both jobs find each other, and what carries their messages.

join             each rank announces itself, and reads who takes part
connecting       the ranks of one host connect to each other, and to no other process
channels         the connected sockets: messages and file descriptors
unread_messages  messages that have arrived over channels and are not used yet
message_router   sends a message by channel or through the store, whichever reaches the other rank
"""
