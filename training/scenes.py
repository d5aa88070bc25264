"""Pseudo-labels for SPAQ's nine scenes from ImageNet probabilities. No scene label was seen by anybody: a stop-gap."""

from __future__ import annotations

import numpy as np

from picinspector.schema import SCENES

#: ImageNet-1k class indices (ILSVRC 2012 order) per scene. Animals are 0-397. Objects and food not named here are
#: `still_life`, vehicles and sports `other`.
_CLASSES = {
    "cityscape": (
        "407 425 442 449 468 483 497 498 500 517 525 536 538 547 562 569 654 660 663 668 675 682 698 704 705 "
        "718 727 734 743 821 829 832 839 853 858 873 874 877 888 900 915 919 920 "
    ),
    "human": (
        "399 400 411 433 439 443 445 451 452 457 459 461 465 474 501 515 518 524 529 552 560 568 570 578 584 "
        "585 601 608 610 614 617 638 639 643 652 655 667 678 689 691 697 715 724 735 775 785 793 796 808 824 "
        "834 836 837 841 842 869 887 903 906 981 982 983 "
    ),
    "indoor": (
        "415 421 423 424 431 435 453 454 467 493 495 509 516 520 526 527 532 534 548 556 564 579 580 582 598 "
        "619 624 648 651 669 706 729 736 750 753 760 762 765 782 788 789 794 799 811 819 827 831 846 851 854 "
        "857 860 861 865 876 881 894 896 897 904 905 "
    ),
    "landscape": "460 484 540 649 672 694 780 812 825 871 912 914 970 972 973 974 975 976 977 978 979 980",
    "plant": "716 738 936 937 938 944 946 947 948 949 958 984 985 986 987 988 989 990 991 992 993 994 995 996 997 998",
    "other": (
        "403 404 405 408 416 417 422 429 430 436 444 450 466 472 479 510 511 535 537 554 555 557 561 565 573 "
        "574 575 576 586 595 602 603 609 612 621 625 627 628 634 656 657 661 665 670 671 690 693 701 702 703 "
        "717 730 744 747 751 752 755 757 768 779 781 795 802 803 805 807 814 815 817 820 833 847 852 856 864 "
        "866 867 870 880 890 895 908 913 916 917 918 921 922 "
    ),
}
_NIGHT_LUMA = 0.22  # mean luma 0-1 below which a place is called night
_NIGHT_WIDTH = 0.03


def scene_targets(logits: np.ndarray, luma: np.ndarray) -> np.ndarray:
    """Soft scene labels (N, 9), rows sum to 1.

    Args:
        logits: (N, 1000) of an ImageNet classifier.
        luma: (N,) mean luma 0-1; dark cityscapes, landscapes and others become `night`.
    """
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    scenes = probs @ class_to_scene()  # (N, 9)
    dark = 1.0 / (1.0 + np.exp((luma - _NIGHT_LUMA) / _NIGHT_WIDTH))  # (N,)
    for name in ("cityscape", "landscape", "other", "still_life"):
        moved = dark * scenes[:, SCENES.index(name)]
        scenes[:, SCENES.index(name)] -= moved
        scenes[:, SCENES.index("night")] += moved
    return scenes


def class_to_scene() -> np.ndarray:
    """(1000, 9), one 1 a row."""
    scene_of = np.full(1000, SCENES.index("still_life"))
    scene_of[:398] = SCENES.index("animal")
    for name, classes in _CLASSES.items():
        scene_of[[int(index) for index in classes.split()]] = SCENES.index(name)
    return np.eye(len(SCENES))[scene_of]
