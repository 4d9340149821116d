"""Rendezvous: how the ranks of both jobs find each other and what they say is carried.

store     the TCPStore that both jobs share: hosted on loopback, signed, bounded
bounded_calls  calls of the store, which end also where its process is stopped
wire      records as checked JSON, with run, key and writer
ignored   what lies in the store and was not written by this run
secret_check  whether the other job has another secret
join      a rank tells who it is, and waits until everybody has
roster    who is there, on which host, with which modules
connecting  the ranks of one host connect to each other, and to nobody else
channels  what goes over these connections: letters and file descriptors, which saves the store's round trips
unread_letters  what has come over them and was not taken yet
courier   takes a channel or the store, whichever reaches the other rank
"""
