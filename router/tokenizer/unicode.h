/* Character classes as Rust's regex and char see them. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

bool moe_is_white_space(uint32_t code_point); /* Unicode's White_Space */
bool moe_is_word(uint32_t code_point);        /* Alphabetic, M, Nd, Pc, Join_Control (UTS #18, annex C) */
/* Unicode's canonical combining class; 0: a starter. */
int moe_combining_class(uint32_t code_point);
