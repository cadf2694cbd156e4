/*! Included by sources of the wheel that use nothing of it. */
