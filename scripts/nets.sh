# source scripts/nets.sh   (as common.sh, quickstart.sh and study.sh do)
#
# The rows of clever.methods.METHODS, for scripts that start before there is a Python; a test compares them.
# shellcheck shell=bash
# shellcheck disable=SC2034  # used by those scripts
ALL_NETS="dino CLeVER augself essl equimod equimod_pair sie care"
TOLD_NETS="augself equimod equimod_pair sie"
SPLIT_NETS="CLeVER sie" # those with an IR and an EF; so has any other with --equiv_part EF

# parts_of NET FLAGS: print the parts of the representation after a pretraining with these flags, as --else_part names them.
parts_of() {
  if [[ " $SPLIT_NETS " == *" $1 "* || " ${2:-} " == *" --equiv_part EF "* ]]; then echo "ALL main_part else_part"; else echo ALL; fi
}
