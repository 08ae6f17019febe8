#include "cli/timeline_svg.h"

#include <math.h>
#include <string.h>

#include "common/alloc.h"

#define WIDTH 1400.0
#define LEFT 148.0
#define RIGHT 24.0
#define PLOT (WIDTH - LEFT - RIGHT)
#define TOP 112.0 /* title, legend, layer labels */
#define ROW 24.0
#define GAP 14.0 /* between lanes */
#define MAX_ROWS 4
#define FEW_LAYERS 8 /* with more, one step is shown */
#define MAX_TICKS 12
#define LABEL_MIN_WIDTH 26.0

enum { LANE_ROUTER, LANE_EXPERTS, LANE_HOST, LANE_AHEAD, LANE_DEMAND, NUM_LANES };

static const char *const lane_names[NUM_LANES] = {"router segments", "expert compute", "experts on the host", "copies ahead",
                                                  "copies on demand"};

static const struct {
    const char *class, *colour, *about;
    int lane;
} kinds[] = {[MOE_TIMELINE_SEGMENT] = {"segment", "#4c78a8", "attention, norm, gate (router)", LANE_ROUTER},
             [MOE_TIMELINE_PASS] = {"pass", "#3f8f4f", "experts of a layer", LANE_EXPERTS},
             [MOE_TIMELINE_HOST] = {"host", "#17909c", "experts on the host", LANE_HOST},
             [MOE_TIMELINE_STALL] = {"stall", "#e45756", "waiting for experts", LANE_EXPERTS},
             [MOE_TIMELINE_AHEAD] = {"ahead", "#9467bd", "copy, announced a layer ahead", LANE_AHEAD},
             [MOE_TIMELINE_DEMAND] = {"demand", "#f28e2b", "copy on demand", LANE_DEMAND},
             [MOE_TIMELINE_GIVEN_UP] = {"given-up", "#b8b8b8", "copy given up", LANE_AHEAD}};
#define NUM_KINDS ((int)(sizeof kinds / sizeof *kinds))

typedef struct canvas {
    FILE *out;
    const moe_timeline_picture *p;
    int64_t begin_ns, end_ns;
    int32_t rows[NUM_LANES];
    double lane_y[NUM_LANES], bottom;
} canvas;

static double x_of(const canvas *c, int64_t ns) {
    double part = (double)(ns - c->begin_ns) / (double)(c->end_ns - c->begin_ns);
    return LEFT + PLOT * (part < 0 ? 0 : part > 1 ? 1 : part);
}

static double ms(int64_t ns) { return (double)ns / 1e6; }

static bool shown(const canvas *c, const moe_timeline_event *e) { return e->end_ns > c->begin_ns && e->begin_ns < c->end_ns; }

static bool is_copy(const moe_timeline_event *e) { return e->kind >= MOE_TIMELINE_AHEAD; }

/* From the first segment of the steps that are shown to the end of the last. */
static void choose_window(canvas *c) {
    const moe_timeline *t = c->p->timeline;
    int32_t wanted = c->p->num_moe_layers <= FEW_LAYERS ? 2 : 1;
    c->begin_ns = c->end_ns = 0;
    for (int32_t i = moe_timeline_count(t) - 1; i >= 0 && wanted > 0; i--) {
        const moe_timeline_event *e = moe_timeline_at(t, i);
        if (e->kind != MOE_TIMELINE_SEGMENT) continue;
        if (c->end_ns == 0) c->end_ns = e->end_ns;
        c->begin_ns = e->begin_ns;
        if (e->layer == 0) wanted--;
    }
    if (c->end_ns <= c->begin_ns) c->end_ns = c->begin_ns + MOE_NS_PER_MS;
}

/* The row of each copy in its lane, so that copies side by side stand below each other; others have one row. */
static int32_t row_of(canvas *c, const moe_timeline_event *e, int64_t until[NUM_LANES][MAX_ROWS]) {
    int lane = kinds[e->kind].lane;
    int32_t row = 0;
    while (is_copy(e) && row < MAX_ROWS - 1 && until[lane][row] > e->begin_ns) row++;
    until[lane][row] = e->end_ns;
    if (row >= c->rows[lane]) c->rows[lane] = row + 1;
    return row;
}

/* ---- parts of the picture ---- */

static void put_text(FILE *out, const char *text) {
    for (; *text; text++) {
        if (*text == '&' || *text == '<' || *text == '>')
            fprintf(out, "&#%d;", *text);
        else
            fputc(*text, out);
    }
}

static void head(const canvas *c) {
    FILE *out = c->out;
    fprintf(out,
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %.0f %.0f\" width=\"%.0f\" height=\"%.0f\" role=\"img\">\n"
            "<style>text{font:12px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;fill:#333}"
            ".h{font-size:17px;font-weight:600;fill:#111}.s{font-size:13px;fill:#555}.l{text-anchor:end;font-weight:600}"
            ".c{text-anchor:middle}.b{text-anchor:middle;fill:#fff;font-size:10px;pointer-events:none}.f{font-size:13px;fill:#111}",
            WIDTH, c->bottom + 78, WIDTH, c->bottom + 78);
    for (int k = 0; k < NUM_KINDS; k++) fprintf(out, ".%s{fill:%s}", kinds[k].class, kinds[k].colour);
    fprintf(out, ".stall{fill-opacity:.45}</style>\n<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n"
                 "<text class=\"h\" x=\"16\" y=\"28\">");
    put_text(out, c->p->title);
    fprintf(out, "</text>\n");
}

static void legend(const canvas *c) {
    double x = 16;
    for (int k = 0; k < NUM_KINDS; k++) {
        if (c->rows[kinds[k].lane] == 0) continue;
        fprintf(c->out,
                "<rect class=\"%s\" x=\"%.0f\" y=\"45\" width=\"14\" height=\"14\" rx=\"2\"/><text x=\"%.0f\" y=\"56.5\">%s</text>\n",
                kinds[k].class, x, x + 20, kinds[k].about);
        x += 44 + 6.6 * (double)strlen(kinds[k].about);
    }
}

static void layer_label(const canvas *c, int32_t layer, double x, double width) {
    fprintf(c->out, "<text class=\"c\" x=\"%.2f\" y=\"%.1f\">", x, TOP - 6);
    if (layer == c->p->num_moe_layers)
        fprintf(c->out, "logits</text>\n");
    else
        fprintf(c->out, "%s%d</text>\n", width > 60 ? "layer " : "", layer);
}

/* A band from where a layer's segment begins to where the next one's does, so that its experts are in it. */
static void layer_bands(const canvas *c) {
    const moe_timeline *t = c->p->timeline;
    double height = c->bottom - TOP;
    for (int32_t i = 0; i < moe_timeline_count(t); i++) {
        const moe_timeline_event *e = moe_timeline_at(t, i);
        if (e->kind != MOE_TIMELINE_SEGMENT || !shown(c, e)) continue;
        int64_t end_ns = c->end_ns;
        for (int32_t j = i + 1; j < moe_timeline_count(t); j++)
            if (moe_timeline_at(t, j)->kind == MOE_TIMELINE_SEGMENT) {
                end_ns = moe_timeline_at(t, j)->begin_ns;
                break;
            }
        double x = x_of(c, e->begin_ns), width = x_of(c, end_ns) - x;
        fprintf(c->out, "<rect x=\"%.2f\" y=\"%.1f\" width=\"%.2f\" height=\"%.1f\" fill=\"%s\"/>\n", x, TOP, width, height,
                e->layer % 2 ? "#eef1f5" : "#f8f9fb");
        if (e->layer == 0)
            fprintf(c->out, "<path d=\"M%.2f %.1fV%.1f\" stroke=\"#777\" stroke-dasharray=\"4 3\"/>\n", x, TOP - 30, c->bottom);
        if (e->layer == 0)
            fprintf(c->out, "<text class=\"s\" x=\"%.2f\" y=\"%.1f\">a step of %d token%s</text>\n", x + 5, TOP - 21, e->count,
                    e->count == 1 ? "" : "s");
        if (width >= LABEL_MIN_WIDTH) layer_label(c, e->layer, x + width / 2, width);
    }
}

static void lanes(const canvas *c) {
    for (int lane = 0; lane < NUM_LANES; lane++) {
        if (c->rows[lane] == 0) continue;
        double height = ROW * c->rows[lane];
        fprintf(c->out, "<text class=\"l\" x=\"%.0f\" y=\"%.1f\">%s</text>\n", LEFT - 10, c->lane_y[lane] + height / 2 + 4,
                lane_names[lane]);
        fprintf(c->out, "<path d=\"M%.0f %.1fH%.0f\" stroke=\"#d5d9df\"/>\n", LEFT, c->lane_y[lane] + height + GAP / 2, WIDTH - RIGHT);
    }
}

static void describe(FILE *out, const canvas *c, const moe_timeline_event *e) {
    double from = ms(e->begin_ns - c->begin_ns), to = ms(e->end_ns - c->begin_ns);
    if (e->kind == MOE_TIMELINE_SEGMENT && e->layer == c->p->num_moe_layers)
        fprintf(out, "segment logits");
    else if (is_copy(e))
        fprintf(out, "%s layer %d expert %d", kinds[e->kind].class, e->layer, e->count);
    else if (e->kind == MOE_TIMELINE_PASS || e->kind == MOE_TIMELINE_HOST)
        fprintf(out, "%s layer %d experts %d", kinds[e->kind].class, e->layer, e->count);
    else
        fprintf(out, "%s layer %d", kinds[e->kind].class, e->layer);
    fprintf(out, ": %.4f to %.4f ms", from, to);
}

static void bars(canvas *c) {
    const moe_timeline *t = c->p->timeline;
    int64_t until[NUM_LANES][MAX_ROWS] = {{0}};
    for (int32_t i = 0; i < moe_timeline_count(t); i++) {
        const moe_timeline_event *e = moe_timeline_at(t, i);
        if (!shown(c, e)) continue;
        int32_t row = row_of(c, e, until);
        double x = x_of(c, e->begin_ns), width = x_of(c, e->end_ns) - x, y = c->lane_y[kinds[e->kind].lane] + ROW * row;
        fprintf(c->out, "<rect class=\"%s\" x=\"%.2f\" y=\"%.1f\" width=\"%.2f\" height=\"%.0f\" rx=\"2\"><title>",
                kinds[e->kind].class, x, y + 1, width < 0.8 ? 0.8 : width, ROW - 4);
        describe(c->out, c, e);
        fprintf(c->out, "</title></rect>\n");
        if (is_copy(e) && width >= LABEL_MIN_WIDTH)
            fprintf(c->out, "<text class=\"b\" x=\"%.2f\" y=\"%.1f\">%d.%d</text>\n", x + width / 2, y + ROW / 2 + 2.5, e->layer, e->count);
    }
}

/* A step of 1, 2 or 5 times a power of ten. */
static double tick_ms(double span_ms) {
    double least = span_ms / MAX_TICKS, unit = pow(10, floor(log10(least)));
    return least <= unit ? unit : least <= 2 * unit ? 2 * unit : least <= 5 * unit ? 5 * unit : 10 * unit;
}

static void axis(const canvas *c) {
    double span = ms(c->end_ns - c->begin_ns), tick = tick_ms(span);
    fprintf(c->out, "<path d=\"M%.0f %.1fH%.0f\" stroke=\"#444\"/>\n", LEFT, c->bottom, WIDTH - RIGHT);
    for (int i = 0; i * tick <= span; i++) {
        double x = LEFT + PLOT * i * tick / span;
        fprintf(c->out, "<path d=\"M%.2f %.1fv5\" stroke=\"#444\"/><text class=\"c\" x=\"%.2f\" y=\"%.1f\">%g</text>\n", x, c->bottom, x,
                c->bottom + 18, i * tick);
    }
    fprintf(c->out, "<text class=\"l\" x=\"%.0f\" y=\"%.1f\">ms</text>\n", LEFT - 10, c->bottom + 18);
}

/* ---- what it shows, in figures ---- */

/* The time in the window in which a copy runs, and the part of it beside computation: by the ends of events, in order. */
static void overlap(const canvas *c, int64_t *copying_ns, int64_t *beside_ns, int64_t *stalled_ns) {
    const moe_timeline *t = c->p->timeline;
    *copying_ns = *beside_ns = *stalled_ns = 0;
    for (int64_t now = c->begin_ns; now < c->end_ns;) {
        bool copies = false, computes = false, stalls = false;
        int64_t next = c->end_ns;
        for (int32_t i = 0; i < moe_timeline_count(t); i++) {
            const moe_timeline_event *e = moe_timeline_at(t, i);
            bool runs = e->begin_ns <= now && e->end_ns > now;
            int64_t change = e->begin_ns > now ? e->begin_ns : e->end_ns;
            if (change > now && change < next) next = change;
            copies = copies || (runs && is_copy(e));
            stalls = stalls || (runs && e->kind == MOE_TIMELINE_STALL);
            computes = computes || (runs && e->kind < MOE_TIMELINE_STALL);
        }
        if (copies) *copying_ns += next - now;
        if (copies && computes) *beside_ns += next - now;
        if (stalls) *stalled_ns += next - now;
        now = next;
    }
}

static void foot(const canvas *c) {
    int64_t copying_ns, beside_ns, stalled_ns;
    overlap(c, &copying_ns, &beside_ns, &stalled_ns);
    fprintf(c->out,
            "<text class=\"f\" x=\"16\" y=\"%.1f\">Copies run for %.3f ms of the %.3f ms shown, %.0f %% of that beside computation; "
            "experts are waited for %.3f ms. A copy's label is layer.expert.</text>\n</svg>\n",
            c->bottom + 52, ms(copying_ns), ms(c->end_ns - c->begin_ns), copying_ns ? 100.0 * (double)beside_ns / (double)copying_ns : 0.0,
            ms(stalled_ns));
}

static void lay_out(canvas *c) {
    int64_t until[NUM_LANES][MAX_ROWS] = {{0}};
    for (int lane = 0; lane < NUM_LANES; lane++) c->rows[lane] = lane != LANE_HOST; /* that one is there where it is used */
    for (int32_t i = 0; i < moe_timeline_count(c->p->timeline); i++) {
        const moe_timeline_event *e = moe_timeline_at(c->p->timeline, i);
        if (shown(c, e)) row_of(c, e, until);
    }
    double y = TOP + GAP / 2;
    for (int lane = 0; lane < NUM_LANES; lane++) {
        c->lane_y[lane] = y;
        y += c->rows[lane] ? ROW * c->rows[lane] + GAP : 0;
    }
    c->bottom = y - GAP / 2;
}

void moe_timeline_draw(FILE *out, const moe_timeline_picture *picture) {
    canvas c = {.out = out, .p = picture};
    choose_window(&c);
    lay_out(&c);
    head(&c);
    legend(&c);
    layer_bands(&c);
    lanes(&c);
    bars(&c);
    axis(&c);
    foot(&c);
}
