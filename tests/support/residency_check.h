/* What must hold of a residency between two turns, counted anew from its tables; the test fails with what does not. */
#pragma once
#include "expert-worker/residency.h"

void residency_check(const moe_residency *residency);
void residency_counts_add(moe_residency_counts *to, const moe_residency_counts *more);
