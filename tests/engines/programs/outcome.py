"""What programs say of calls that are to be refused."""

import dualkv


def code_of(call, *arguments, **options):
    """The code and the message of the Error that a call raises; None if it raises none."""
    try:
        call(*arguments, **options)
    except dualkv.Error as error:
        return [error.code, error.message]
    return None
