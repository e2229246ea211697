/* A minimal adapter for the conformance cases of eqfact, in C99 without a library: where a port in firmware would start.
 *
 * It claims level 5 and answers one of its questions, "requantize": what an integer engine does with the sums of a layer,
 * q = clip(round(n M) + z, qmin, qmax) with M = (s_x s_w) / s_y in the network's type (docs/integers.md). Everything else is skipped.
 * The protocol is docs/porting.md: a JSON object a line, and one line back.
 *
 *     cc -std=c99 -O2 -ffp-contract=off -o adapter adapter.c -lm && eqfact conform --cmd ./adapter --level 5
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINE = 1 << 20, MOST = 4096 };

static char line[LINE];
static unsigned char bytes[LINE];

/* What stands behind "key": in a text; the questions have every key once, but for those within arrays, which are looked up behind their own. */
static const char *after(const char *text, const char *key) {
    char quoted[64];
    snprintf(quoted, sizeof quoted, "\"%s\": ", key);
    const char *found = text ? strstr(text, quoted) : NULL;
    return found ? found + strlen(quoted) : NULL;
}

static int digit(char c) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const char *at = c ? strchr(digits, c) : NULL;
    return at ? (int)(at - digits) : -1;
}

/* The bytes of an array's base64; how many. */
static size_t decoded(const char *array) {
    const char *text = after(array, "base64");
    size_t count = 0;
    uint32_t bits = 0;
    int held = 0;
    for (text = text ? text + 1 : ""; digit(*text) >= 0; text++) {
        bits = bits << 6 | (uint32_t)digit(*text);
        if ((held += 6) >= 8) {
            held -= 8;
            bytes[count++] = (unsigned char)(bits >> held);
        }
    }
    return count;
}

/* Eight bytes, least significant first, whatever the processor's order. */
static uint64_t word(size_t i) {
    uint64_t w = 0;
    for (int k = 7; k >= 0; k--) w = w << 8 | bytes[8 * i + (size_t)k];
    return w;
}

static size_t doubles(const char *array, double *to) {
    size_t count = decoded(array) / 8;
    for (size_t i = 0; i < count && i < MOST; i++) {
        uint64_t w = word(i);
        memcpy(to + i, &w, sizeof w);
    }
    return count;
}

static size_t whole(const char *array, int64_t *to) {
    size_t count = decoded(array) / 8;
    for (size_t i = 0; i < count && i < MOST; i++) to[i] = (int64_t)word(i);
    return count;
}

/* An array of int32 as JSON: its shape is copied from the question's. */
static void put(const int32_t *q, size_t count, const char *shape) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    printf("{\"dtype\": \"int32\", \"shape\": %.*s, \"base64\": \"", (int)(strchr(shape, ']') - shape + 1), shape);
    for (size_t i = 0; i < 4 * count; i += 3) {
        uint32_t bits = 0;
        for (size_t k = 0; k < 3; k++) bits = bits << 8 | (i + k < 4 * count ? (uint32_t)q[(i + k) / 4] >> 8 * ((i + k) % 4) & 255 : 0);
        for (size_t k = 0; k < 4; k++) putchar(i + k > 4 * count ? '=' : digits[bits >> (18 - 6 * k) & 63]);
    }
    printf("\"}");
}

static double clipped(double r, double zero, double low, double high) {
    r = rint(r) + zero; /* the default rounding is half to even */
    return r < low ? low : r > high ? high : r;
}

static void requantize(const char *question) {
    static int64_t n[MOST], zero[MOST];
    static double s_w[MOST], s_y[MOST];
    static int32_t q[MOST];
    const char *sums = after(question, "n"), *shape = after(sums, "shape"), *grid = after(question, "grid");
    double s_x = strtod(after(question, "input_scale"), NULL);
    int single = strncmp(after(strstr(question, "\"rounding\""), "dtype"), "\"float32\"", 9) == 0;
    size_t count = whole(sums, n), scales = doubles(after(question, "weight_scale"), s_w);
    doubles(after(grid, "scale"), s_y);
    whole(after(grid, "zero_point"), zero);
    double low = strtod(after(grid, "qmin"), NULL), high = strtod(after(grid, "qmax"), NULL);
    long channels = 1, pixels = 1, axis = 0;
    for (const char *at = shape; *at && *at != ']'; at++) /* (N, C, *spatial) */
        if (strchr("0123456789", *at)) {
            char *end;
            long size = strtol(at, &end, 10);
            if (axis++ == 1) channels = size; else if (axis > 2) pixels *= size;
            at = end - 1;
        }
    for (size_t i = 0; i < count; i++) {
        size_t channel = scales > 1 ? i / (size_t)pixels % (size_t)channels : 0;
        double r;
        if (single) {
            volatile float step = (float)s_x * (float)s_w[channel]; /* volatile: rounded after every operation */
            volatile float m = step / (float)s_y[0];
            volatile float product = (float)n[i] * m;
            r = product;
        } else {
            volatile double step = s_x * s_w[channel];
            volatile double m = step / s_y[0];
            r = (double)n[i] * m;
        }
        q[i] = (int32_t)clipped(r, (double)zero[0], low, high);
    }
    printf("\"answer\": {\"q\": ");
    put(q, count, shape);
    printf("}");
}

int main(void) {
    while (fgets(line, sizeof line, stdin)) {
        const char *id = after(line, "id"), *ask = after(line, "ask");
        if (!id || !ask) return 1;
        printf("{\"id\": %ld, ", strtol(id, NULL, 10));
        if (strncmp(ask, "\"hello\"", 7) == 0)
            printf("\"answer\": {\"name\": \"minimal\", \"version\": \"1\", \"language\": \"C\", \"protocol\": 1, \"levels\": [5]}");
        else if (strncmp(ask, "\"requantize\"", 12) == 0)
            requantize(line);
        else
            printf("\"skip\": \"not in this port\"");
        printf("}\n");
        fflush(stdout);
    }
    return 0;
}
