/* Asks libxlutil what it makes of texts: xl's own reading of its configuration language and of disk lines.
 *
 * usage: xlu < QUESTIONS. A question is a line "disk N" or "cfg N" and N bytes after it; an answer is one line.
 *   disk: the errno, then where it is 0: target vdev access script backendtype format cdrom
 *   cfg:  the errno, then where it is 0: each string of the list `disk`, up to its first entry that is none
 * Texts are written in hexadecimal after a colon, "-" is one that is not there.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <libxlutil.h>

static void put(const char *text)
{
    printf(text ? " :" : " -");
    for (; text && *text; text++)
        printf("%02x", (unsigned char)*text);
}

static void ask_disk(XLU_Config *config, const char *line)
{
    libxl_device_disk disk;
    int error;

    libxl_device_disk_init(&disk);
    error = xlu_disk_parse(config, 1, &line, &disk);
    printf("%d", error);
    if (!error) {
        put(disk.pdev_path);
        put(disk.vdev);
        put(disk.readwrite ? "rw" : "ro");
        put(disk.script);
        put(libxl_disk_backend_to_string(disk.backend));
        put(libxl_disk_format_to_string(disk.format));
        put(disk.is_cdrom ? "cdrom" : "disk");
    }
    libxl_device_disk_dispose(&disk);
}

static void ask_cfg(XLU_Config *config, const char *text, int length)
{
    XLU_ConfigList *list;
    const char *entry;
    int error = xlu_cfg_readdata(config, text, length);
    int count = 0;

    printf("%d", error);
    if (!error && !xlu_cfg_get_list(config, "disk", &list, &count, 1))
        for (int place = 0; (entry = xlu_cfg_get_listitem(list, place)); place++)
            put(entry);
}

int main(void)
{
    FILE *silence = fopen("/dev/null", "w");
    char kind[8];
    int length;

    while (scanf("%7s %d", kind, &length) == 2) {
        XLU_Config *config = xlu_cfg_init(silence, "text");
        char *text = calloc(1, length + 1);

        if (getchar() != '\n' || fread(text, 1, length, stdin) != (size_t)length)
            return 1;
        if (strcmp(kind, "disk"))
            ask_cfg(config, text, length);
        else
            ask_disk(config, text);
        putchar('\n');
        free(text);
        xlu_cfg_destroy(config);
    }
    return 0;
}
