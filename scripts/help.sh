# Sourced by scripts after they have changed to the repository's root. With --help as the first argument it prints the
# comment at the script's top, then that of the common.sh which the script sources, and ends the script.
comment_at_the_top() {
    awk 'NR == 1 && /^#!/ { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$1"
}

case ${1:-} in
    -h | --help)
        script=$(cd "${OLDPWD:-.}" && realpath "$0")
        comment_at_the_top "$script"
        while read -r common; do
            echo
            comment_at_the_top "$common"
        done < <(sed -n 's/^source \(.*common\.sh\)$/\1/p' "$script")
        exit 0
        ;;
esac
