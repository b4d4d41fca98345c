// What most sources begin with, and what knows no layout: parsed once for all libraries (build.py).
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "element.h"
